"""The one exception of the recipes."""


class RecipeError(ValueError):
    """What the user can fix; its message is one sentence, printed without a traceback."""
