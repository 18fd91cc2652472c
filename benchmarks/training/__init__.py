"""Runs of the whole method, and of what feeds it.

    fashion_mnist.py       every stage of the method by the command line on Fashion-MNIST: 40 minutes on a CPU
    input.py               images per second of the loaders, and of the step that they have to feed
    processes.py           images per second of the training loop on one and on several processes
    online_importance.py   ``importance="online"`` against passes over calibration images

Each is a command, and writes a JSON of its own, as results/ has them.
"""
