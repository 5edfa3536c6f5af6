import sys
from pathlib import Path

# For `small_detectors`, under pytest's importlib mode.
sys.path.insert(0, str(Path(__file__).parent))
