"""One DeepSparse engine: python deepsparse_worker.py MODEL.onnx X.npy Y.npy CORES, in an environment of its own.

rivals_sparse.py starts it. A line on standard input is a run, answered by a line; "save" also writes its output.
"""

import sys

import deepsparse
import numpy as np

model, x_path, y_path, cores = sys.argv[1:]
x = np.load(x_path)
engine = deepsparse.compile_model(model, batch_size=len(x), num_cores=int(cores))
sys.stdout.write("ready\n")
sys.stdout.flush()
for line in sys.stdin:
    y = engine.run([x])[0]
    if line == "save\n":
        np.save(y_path, y)
    sys.stdout.write("done\n")
    sys.stdout.flush()
