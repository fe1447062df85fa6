"""The atlas in the browser: pages that are read, and a JSON API for everything they show.

    app         `create_app`: everything below, put together
    door        who may come in, how much they may send, and the headers of every answer
    shelf       the open atlases; one that was made anew is opened again
    render      templates, and how tokens and numbers are shown
    shapes      what both tell, field by field; `views` gathers it
    pages       the pages
    api         the JSON API (`/api/openapi.json`)
    live        the language model, one for all: who asks takes turns (`turns`, `streams`)
    steer       the steering page
    why         what the next token owes to features, and what follows without them
    contrast    two sets of prompts, told apart
    labeling    labels of chosen features, written by a process of its own
    reports     the safety audit and the multilingual report, where they were made
    monitor_api alerts on a text (`POST /v1/monitor`)
    openai_api  the (steered) model behind OpenAI's API

The style sheet, the templates and all JavaScript are files of this package; nothing is fetched from elsewhere.
"""

from sae_core.serve.app import create_app

__all__ = ["create_app"]
