"""The one error of this package."""


class RewardError(ValueError):
    """A reward is not found, is called wrongly, returns something wrong or meets broken data."""
