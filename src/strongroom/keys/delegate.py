"""Methods of a part as methods of the object that is made of parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import getattr_static, iscoroutinefunction
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from ..cooperative import to_be_awaited

P = ParamSpec("P")
R = TypeVar("R")


class Delegate(Generic[P, R]):
    """`verify = Delegate("verifier", Verifier.verify)`: `whole.verify` is `whole.verifier.verify`.

    The signature and the description are written once, at the part, and type checkers see them here too. The bound
    method is kept in the object at its first use, so that a call costs what a call of the part costs.
    """

    def __init__(self, part: str, method: Callable[Concatenate[Any, P], R]) -> None:
        self._part = part
        self._method = method
        self.__doc__ = method.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

        @wraps(self._method)
        def of_class(whole: Any, *args: P.args, **kwargs: P.kwargs) -> R:
            bound: Callable[P, R] = getattr(whole, name)
            return bound(*args, **kwargs)

        self._of_class = to_be_awaited(of_class) if iscoroutinefunction(self._method) else of_class

    @overload
    def __get__(self, whole: None, owner: type) -> Callable[Concatenate[Any, P], R]: ...

    @overload
    def __get__(self, whole: object, owner: type) -> Callable[P, R]: ...

    def __get__(self, whole: object | None, owner: type) -> Callable[..., R]:
        if whole is None:
            return self._of_class
        bound: Callable[P, R] = getattr(getattr(whole, self._part), self._method.__name__)
        if getattr_static(type(whole), self._name) is self:  # else a subclass has a method of its own, and calls this
            whole.__dict__[self._name] = bound
        return bound
