import os

os.environ["BROKER"], os.environ["RESULTS"] = "memory://", "cache+memory://"
