"""What sharing would gain on recorded rollouts; the command is ``tools/plan_sharing.py``."""
