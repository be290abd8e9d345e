"""`python -m llamafactory_ogpsa train …`: `llamafactory-cli` with OGPSA if PyTorch's autoloading is off."""

from .autoload import register


def main() -> None:
    """Install the import hook, then run LLaMA-Factory's own command line."""
    register()
    from llamafactory.cli import main as llamafactory_main

    llamafactory_main()


if __name__ == "__main__":
    main()
