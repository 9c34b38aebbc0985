"""What routers of packed rows are told, lose, replay and record."""

from .losses import (
    ROUTER_LOSSES,
    has_router_losses,
    has_sample_losses,
    take_router_losses,
    undivided_router_losses,
)
from .routes import RouteRecorder, TopK, check_replayable, check_routes, check_routes_of
from .row import RouterRow, as_mask, membership, multiplicity_digits

__all__ = [
    "ROUTER_LOSSES",
    "RouteRecorder",
    "RouterRow",
    "TopK",
    "as_mask",
    "check_replayable",
    "check_routes",
    "check_routes_of",
    "has_router_losses",
    "has_sample_losses",
    "membership",
    "multiplicity_digits",
    "take_router_losses",
    "undivided_router_losses",
]
