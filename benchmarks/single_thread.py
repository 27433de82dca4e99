"""Import before numpy: pins the libraries of linear algebra to one thread; they read these variables once."""

import os

for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
