"""The policy: a DeepSeek-V3 trunk, its router and balance, its multi-token-prediction modules."""
