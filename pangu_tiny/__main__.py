"""`python -m pangu_tiny` is `pangu-tiny`."""

import sys

from pangu_tiny.cli import main

sys.exit(main())
