"""Scripts of the project in rooms, and the modules that they share.

Each script runs from the checkout, ``python tools/ROOM/NAME.py``. It imports others as
``from tools.ROOM import NAME``; for this it puts the checkout in the place of its own
folder on ``sys.path``. A wheel has the rooms that users need in ``rambo_det/.mim``, and
``python -m rambo_det NAME`` runs a script there.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
