"""Settings that must be there before torch is loaded."""

import os

from pipelines.runtime import PATIENT

# Waiting OpenMP threads that spin slow every test down where another process is busy too.
os.environ.update(PATIENT)
