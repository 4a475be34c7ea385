"""Verification inside an application: ASGI, FastAPI, Starlette, Flask and Django, without a network hop.

It imports nothing, so that an application needs only its own framework installed.
"""
