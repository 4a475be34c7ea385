"""To come."""

from fastapi import APIRouter

from ..services import Services


def router(services: Services) -> APIRouter:
    return APIRouter()
