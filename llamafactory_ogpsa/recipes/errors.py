"""The one exception of the recipes."""


class RecipeError(ValueError):
    """An error that the user can fix; its message is one sentence, printed without a traceback."""
