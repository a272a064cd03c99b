"""The version of Atlas and the folder that holds it."""

from pathlib import Path

__version__ = "0.1.0"

# Holds atlas/, launchers/ and conf/, in a checkout and in an editable install.
ROOT = Path(__file__).resolve().parents[1]
