"""Imported by a function, when it is called."""


def answer():
    return 42
