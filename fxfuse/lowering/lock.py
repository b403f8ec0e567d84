"""One tracer or compiler at a time: both set what concerns the whole process."""

import threading

COMPILES = threading.RLock()
