"""Makes the fixtures of core.py known to every test. (They do not stand here: there is a second conftest.py in
kernels/.)"""

from core import *  # noqa: F403
from judge_server import server  # noqa: F401
