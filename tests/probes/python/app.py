from actions import listing, run
from mb_service import service

Handler = service("probe", "1.0.0", {"list": listing, "run": run}, "What Python does in a component")
