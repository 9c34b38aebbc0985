"""Frameworks that training runs in, one folder each; nothing here is imported unless asked for."""

__all__ = ["verl"]
