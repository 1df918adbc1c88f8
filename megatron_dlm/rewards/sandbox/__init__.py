"""Programs that nobody trusts, run apart from everything.

    kernel.py       the system calls that Python has no name for
    filters.py      system calls that a program may not make (seccomp)
    confine.py      one process gives up what it could do: namespaces and a root of its own, Landlock, ids, limits
    boot.py         how that process gets its code, which no file inside holds
    zygote.py       the process that waits inside, forks one child per program, and ends all that the child has started
    programs.py     what a child does: run a whole program, serve a program's functions, or check them
    values.py       plain values as JSON, and nothing else
    remote.py       calling functions of another process that lies
    isolation.py    which level of isolation this host offers, tried for real
    watch.py        the outside: read, measure, stop
    runner.py       the outside: start, feed, and make a verdict

The outside trusts its own code only. A zygote holds no secret: a program's tests never come near it.
"""
