"""Garbage collection, stopped by the import of this module until `main` resumes it: the first import of a service.

Imports make hundreds of thousands of objects and no garbage. To look at them again and again is a sixth of the
processor time of a service's start.
"""

import gc

gc.disable()
