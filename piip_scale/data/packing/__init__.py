"""From the files of a source (COCO, VOC, label maps, folders, lists) to shards, and their verification."""
