import sys

from ssmtune.cli.main import main

sys.exit(main())
