"""Health of Jupyter as users meet it: its status, asked for with the token. Exit 0 or an error."""

import sys
import urllib.request
from pathlib import Path


def main():
    """One authenticated request."""
    token = Path("/run/secrets/jupyter_token").read_text().strip()
    request = urllib.request.Request("http://127.0.0.1:8888/api/status", headers={"Authorization": f"token {token}"})
    try:
        with urllib.request.urlopen(request, timeout=15):
            pass
    except OSError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
