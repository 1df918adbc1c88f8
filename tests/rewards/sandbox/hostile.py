"""Programs that want to pass a test without doing its work, or to harm whoever runs them.

FUNCTIONS: each stands in the place of a program whose `f` must square a number.
PROGRAMS: each stands in the place of one that must print 42; what it prints tells what it could do.
"""

from __future__ import annotations

_RIGHT = "def f(x): return x * x\n"

# name: (program, words of which one must be the outcome)
FUNCTIONS = {
    "exit at the top": ("exit()", {"exit"}),
    "sys.exit(0)": ("import sys\nsys.exit(0)", {"exit"}),
    "raise SystemExit": ("raise SystemExit", {"exit"}),
    "os._exit(0)": ("import os\nos._exit(0)", {"exit", "error"}),
    "exit in the call": ("def f(x): exit(0)", {"exit"}),
    "os._exit in the call": ("import os\ndef f(x): os._exit(0)", {"exit"}),
    "exit in __del__": (
        "import os\nclass A:\n def __del__(self): os._exit(0)\ndef f(x):\n A()\n return 1",
        {"exit"},
    ),
    "KeyboardInterrupt": ("def f(x): raise KeyboardInterrupt", {"exit"}),
    "killed by itself": ("import os\ndef f(x): os.kill(os.getpid(), 9)", {"killed", "exit", "fail", "error"}),
    "exec": ("import os\nos.execv('/bin/true', ['true'])", {"error"}),
    "equals everything": (
        "class All:\n __eq__ = lambda s, o: True\n __ne__ = lambda s, o: False\n __hash__ = lambda s: 0\n"
        "def f(x): return All()",
        {"fail"},
    ),
    "a liar of a list": (
        "class All(list):\n __eq__ = lambda s, o: True\n __len__ = lambda s: 9\ndef f(x): return All()",
        {"fail"},
    ),
    "a liar of an int": ("class All(int):\n __eq__ = lambda s, o: True\ndef f(x): return All(3)", {"fail"}),
    "patched AssertionError": (
        "import builtins\nbuiltins.AssertionError = type('Quiet', (Exception,), {})\ndef f(x): return 1",
        {"fail"},
    ),
    "patched builtins": (
        "import builtins, operator\nbuiltins.len = builtins.abs = builtins.all = lambda *a: 0\n"
        "builtins.compile = builtins.exec = lambda *a, **k: None\noperator.eq = lambda a, b: True\ndef f(x): return 1",
        {"fail", "error", "exit", "timeout"},
    ),
    "patched checker": (
        "import sys\nfor name in list(sys.modules):\n if 'sandbox' in name:\n"
        "  for key in list(vars(sys.modules[name])):\n"
        "   if key in ('FAIL', 'ERROR', 'EXIT', 'FAILED'): setattr(sys.modules[name], key, 'pass')\ndef f(x): return 1",
        {"fail"},
    ),
    "forged verdict": (
        "import os\nfor fd in range(1, 64):\n try: os.write(fd, b'pass')\n except OSError: pass\nos._exit(0)",
        {"exit", "error", "killed"},
    ),
    "forged answers": (
        "import os, json\nm = json.dumps({'value': {'object': -999}}).encode()\n"
        "for _ in range(3): os.write(3, len(m).to_bytes(4, 'big') + m)\ndef f(x): return 1",
        {"exit", "error", "fail"},
    ),
    "nonsense to the checker": ("import os\nos.write(3, b'\\xff' * 4096)\ndef f(x): return 1", {"exit", "killed"}),
    "endless message": (
        "import os\nos.write(3, b'\\x00\\xff\\xff\\xff')\nwhile True: os.write(3, b'[' * 65536)",
        {"exit", "error", "killed", "timeout", "memory"},
    ),
    "looks for the test": (
        "import gc, sys\ndef f(x):\n for o in gc.get_objects():\n"
        "  if isinstance(o, str) and 'assert' in o and 'f(' in o:\n"
        "   return 9\n frame = sys._getframe()\n while frame:\n  for v in frame.f_locals.values():\n"
        "   if isinstance(v, str) and '== 9' in v: return 9\n  frame = frame.f_back\n return 1",
        {"fail"},
    ),
    "atexit and trace": (
        "import atexit, os, sys, threading\natexit.register(lambda: os._exit(0))\n"
        "sys.settrace(lambda *a: os._exit(0))\n"
        "def f(x): return 1",
        {"exit", "fail"},
    ),
    "AssertionError raised by the program": ("def f(x): raise AssertionError", {"fail"}),
    "end of iteration": ("def f(x): raise StopIteration", {"error"}),
    "an error": ("def f(x): return x.y", {"error"}),
    "no function": ("g = 1", {"error"}),
    "no Python": ("def f(x:", {"error", "exit"}),  # its error, or its end, whichever is seen first
    "a thread exits": (
        "import threading, os, time\nthreading.Thread(target=lambda: (time.sleep(0.05), os._exit(0))).start()\n"
        "def f(x):\n time.sleep(0.5)\n return 1",
        {"exit", "error"},
    ),
    "endless loop": ("while True: pass", {"timeout"}),
    "sleeps": ("import time\ndef f(x): time.sleep(60)", {"timeout"}),
    "ignores SIGTERM": (
        "import signal, time\nfor s in range(1, 32):\n try: signal.signal(s, signal.SIG_IGN)\n"
        " except (OSError, ValueError): pass\n"
        "while True: pass",
        {"timeout"},
    ),
    "memory": ("a = bytearray(1 << 40)\n" + _RIGHT, {"memory"}),
    "memory bit by bit": ("a = []\nwhile True: a.append(bytearray(1 << 22))", {"memory"}),
    "recursion": ("import sys\nsys.setrecursionlimit(10 ** 9)\n"
        "def f(x): return f(x + 1) + 1", {"killed", "memory", "timeout"}),
    "output": ("while True: print('x' * 1000)", {"output", "timeout"}),
    "output in the call": ("import os\ndef f(x):\n while True: os.write(1, b'x' * 4096)", {"output"}),
    "an endless value": ("def f(x): return range(10 ** 30)", {"fail"}),
    "an endless iterator": ("import itertools\ndef f(x): return itertools.count()", {"fail"}),
    "a value within itself": ("def f(x):\n a = []\n a.append(a)\n return a", {"error"}),
    "a huge value": ("def f(x): return 'x' * (1 << 25)", {"exit", "memory", "killed", "fail"}),
    "a huge number": ("def f(x): return 1 << (1 << 26)", {"exit", "memory", "killed", "fail", "timeout"}),
    "fork bomb": (
        "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
        {"timeout", "memory"},
    ),
}  # fmt: skip

# name: (program, words of which one must be the outcome); none may print 42
PROGRAMS = {
    "leaves children": (
        "import os, time\nfor _ in range(4):\n if os.fork() == 0:\n  os.setsid()\n  time.sleep(60)\n  os._exit(0)\n"
        "print(1)",
        {"pass"},
    ),
    "leaves a daemon": (
        "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  for fd in range(9):\n"
        "   try: os.close(fd)\n"
        "   except OSError: pass\n  time.sleep(60)\n os._exit(0)\nprint(1)",
        {"pass"},
    ),
    "zombies": (
        "import os, time\nfor _ in range(200):\n try:\n  if os.fork() == 0: os._exit(0)\n except OSError: pass\n"
        "print(1)",
        {"pass"},
    ),
    "threads without end": (
        "import threading, time\nn = 0\ntry:\n for n in range(1000):\n"
        "  threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "except RuntimeError: pass\nprint(42 if n > 100 else n)",
        {"pass", "memory", "killed", "timeout"},
    ),
    "network": (
        "import socket\nfor f, a in ((socket.AF_INET, ('127.0.0.1', 22)), (socket.AF_INET, ('8.8.8.8', 53))):\n"
        " for k in (socket.SOCK_STREAM, socket.SOCK_DGRAM):\n  s = socket.socket(f, k)\n  s.settimeout(1)\n"
        "  s.connect(a)\n  print(42)",
        {"error"},
    ),
    "a socket by the back door": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "print(42 if libc.socket(2, 1, 0) >= 0 or libc.socket(16, 3, 0) >= 0 else 1)",
        {"pass"},
    ),
    "reads secrets": (
        "import os\nfound = 0\n"
        "for p in ('/etc/passwd', '/etc/shadow', '/root/.bashrc', '/proc/1/environ', '/proc/self/environ',\n"
        " os.path.expanduser('~/.ssh/id_rsa'), HERE):\n try:\n  open(p).read()\n  found = 42\n except OSError: pass\n"
        "print(found)",
        {"pass"},
    ),
    "reads the environment": (
        "import os\n"
        "own = {'PYTHONHASHSEED', 'LANG', 'PYTHONUTF8', 'PYTHONDONTWRITEBYTECODE', 'LC_CTYPE', 'PWD'}\n"
        "print(42 if set(os.environ) - own else 1)",
        {"pass"},
    ),
    "reads the grader": (
        "import inspect, sys\nfound = 0\nfor name in list(sys.modules):\n if 'sandbox' in name:\n  try:\n"
        "   inspect.getsource(sys.modules[name])\n"
        "   found = 42\n  except (OSError, TypeError): pass\ntry:\n import megatron_dlm.rewards.code\n found = 42\n"
        "except (ImportError, OSError): pass\nprint(found)",
        {"pass"},
    ),
    "writes outside": (
        "import os\nfound = 0\n"
        "for p in ('/', '/usr/lib', '/lib', '/etc', '/root', '/dev', '/var/tmp', os.path.dirname(os.__file__),\n"
        " os.path.dirname(HERE)):\n try:\n  open(os.path.join(p, 'written'), 'w').close()\n  found = 42\n"
        " except OSError: pass\nprint(found)",
        {"pass"},
    ),
    "fills the disk": (
        "found = 0\ntry:\n for i in range(64):\n  with open(f'file{i}', 'wb') as f:\n"
        "   for _ in range(8): f.write(bytes(1 << 20))\n"
        " found = 42\nexcept OSError: pass\nprint(found)",
        {"pass", "killed"},
    ),
    "kills the parent": (
        "import os, signal\nfound = 0\nfor p in {os.getppid(), 1, -1, PARENT}:\n try:\n"
        "  if p != -1 or os.getpid() == 1: os.kill(p, 9)\n"
        " except OSError: pass\nprint(found)",
        {"pass", "killed"},
    ),
    "kills everybody": ("import os\nos.kill(-1, 9)\nprint(1)", {"pass", "killed", "error"}),
    "looks into the parent": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nprint(42 if libc.ptrace(16, os.getppid(), 0, 0) == 0 else 1)",
        {"pass"},
    ),
    "gets privileges back": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nfound = 0\n"
        "for a in (lambda: os.setuid(0), lambda: os.chroot('/'), lambda: os.mknod('/tmp/x', 0o60666, 1)):\n"
        " try:\n  a()\n  found = 42\n except OSError: pass\nif os.getuid() == 0: found = 0\n"
        "if libc.unshare(0x10000000) == 0 or libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0: found = 42\n"
        "print(found)",
        {"pass"},
    ),
    "raises its limits": (
        "import resource\nfound = 0\n"
        "for w in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):\n"
        " try:\n  resource.setrlimit(w, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n  found = 42\n"
        " except (OSError, ValueError): pass\nprint(found)",
        {"pass"},
    ),
    "looks at what was before": ("import os\nprint(42 if os.listdir('/tmp') else 1)", {"pass", "error"}),
    "too much on stderr": ("import os\nwhile True: os.write(2, b'x' * 4096)", {"output"}),
    "waits for more input": ("import sys\nwhile True: sys.stdin.read()", {"timeout"}),
    "CPU of children": (
        "import os\nfor _ in range(3):\n if os.fork() == 0:\n  while True: pass\nos.wait()",
        {"timeout"},
    ),
    "memory of children": (
        "import os, time\nfor _ in range(6):\n if os.fork() == 0:\n  a = bytearray(100 << 20)\n"
        "  for i in range(0, len(a), 4096): a[i] = 1\n"
        "  time.sleep(60)\ntime.sleep(60)",
        {"memory"},
    ),
    "memory of no process": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "print(42 if libc.memfd_create(b'x', 0) >= 0 or libc.shmget(0, 1 << 30, 0o1600) >= 0 else 1)",
        {"pass"},
    ),
}  # fmt: skip
