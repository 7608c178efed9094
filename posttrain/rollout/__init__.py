"""Rollouts: the vLLM engine, weight sync, and the gate that compares engine and trainer."""
