"""Verification inside an application: ASGI, FastAPI, Starlette, Flask and Django, without a network hop.

Nothing is imported here: each framework is needed only by the module that bears its name.
"""
