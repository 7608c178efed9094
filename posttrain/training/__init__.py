"""Training stages: SFT and GRPO as thin subclasses of TRL's trainers."""
