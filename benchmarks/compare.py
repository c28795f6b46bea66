"""The old name of compare.py, which runs it. It goes with version 0.3."""

import os
import runpy
import sys

if __name__ == '__main__':
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    print('benchmarks/compare.py is compare.py at the root now; this name goes with version 0.3', file=sys.stderr)
    sys.path[0] = root
    runpy.run_path(os.path.join(root, 'compare.py'), run_name='__main__')
