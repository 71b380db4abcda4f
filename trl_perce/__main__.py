# SPDX-License-Identifier: Apache-2.0

"""`python -m trl_perce`: the command line."""

from .cli.main import main


if __name__ == "__main__":
    raise SystemExit(main())
