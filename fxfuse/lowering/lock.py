"""What `lower` traces and compiles, one at a time: both set what concerns the whole process."""

import threading

COMPILES = threading.RLock()
