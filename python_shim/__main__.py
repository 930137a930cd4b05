# SPDX-License-Identifier: Apache-2.0
"""`python -m lacuna_erasure`, or `python -m python_shim` in a checkout."""

import sys

from .cli import main

sys.exit(main())
