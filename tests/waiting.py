"Waiting for a state, not for the clock."
import time

def until(state):
    end = time.monotonic() + 60
    while not state():
        assert time.monotonic() < end, "it never came"
        time.sleep(.002)
