"""Telling somebody: a line in the log, and a message to a webhook when one is set."""

import json
import logging
import os
import urllib.error
import urllib.request

_SECONDS = 10.0
_log = logging.getLogger(__name__)


def notify(text: str, run_id: str) -> bool:
    """Log a line and POST `{"text": ..., "run_id": ...}` to the URL in MIND_ATLAS_WEBHOOK, if there is one.

    A webhook that does not answer is logged and nothing more: nobody's work stops because of a message.

    Returns:
        Whether a webhook took the message.
    """
    _log.info(text)
    url = os.environ.get("MIND_ATLAS_WEBHOOK", "")
    if not url.startswith(("http://", "https://")):
        return False
    body = json.dumps({"text": f"Mind Atlas: {text}", "run_id": run_id}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS):
            return True
    except (OSError, urllib.error.URLError) as error:
        _log.warning("the webhook did not take the message (%s)", type(error).__name__)  # never the URL: it is a secret
        return False
