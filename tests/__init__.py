"""Tests; what they share is in ``tests.helpers``."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
