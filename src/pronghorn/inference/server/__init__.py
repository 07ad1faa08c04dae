"""Serving over HTTP, with OpenAI's API. Needs the packages of the extra `serve`."""
