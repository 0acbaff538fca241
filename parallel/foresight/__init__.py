"""What a layout would take, before it is queued: step time of a cluster, memory, and the best layouts; without torch.

workload     what a step computes, keeps and sends      clusters     devices, links and software, from small files
price        seconds of each part of a step             memory       bytes of the fullest rank
uncertainty  intervals, and correction by measured runs  prediction  a recipe on a cluster       plan  the search
"""
