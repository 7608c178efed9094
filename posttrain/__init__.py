"""SFT and GRPO for DeepSeek-V3-style mixture-of-experts policies, on TRL and vLLM."""

__version__ = "0.1.0"
