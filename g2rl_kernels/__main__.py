"""``python -m g2rl_kernels``: which backend serves which op on this machine, and why the others do not."""

from g2rl_kernels import explain

if __name__ == "__main__":
    print(explain())
