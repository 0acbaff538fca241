"""What a layout would take, before it is queued: step time of a cluster, memory, and the best layouts; without torch.

workload     what a step computes, keeps and sends      clusters    devices, links and software, from small files
price        seconds of each part of a step, closed     operators   what the lab's own code asks of host and memory
replay       a dry run's tape, operator by operator     memory      bytes of the fullest rank
uncertainty  intervals, corrections by measured runs    prediction  a recipe on a cluster       plan  the search
"""
