"""Rewards in processes that can be killed: what hangs or crashes costs its own sample, never the run."""
