"""Models of other libraries behind the five steps of ``models.base``."""
