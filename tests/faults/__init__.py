"""Fault injection: real workers whose copies and messages fail when a test says so.

`plan` says what goes wrong where, `wrapping` puts it around a worker's copies and link, `processes`
starts worker processes that have it. It works from outside: the package has no hook, flag, variable
or message for it, and doesn't know this folder.
"""
