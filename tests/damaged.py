"""Packed sets with samples that cannot be used."""

from piip_scale.data.reading.shards import ShardSet


def damage(folder, *numbers):
    """Overwrites the middle of images inside their shards."""
    shards = ShardSet.open(folder)
    for number in numbers:
        image = shards.read(number).image
        for path in folder.glob("*.tar"):
            position = path.read_bytes().find(image)
            if position >= 0:
                with open(path, "r+b") as file:
                    file.seek(position + len(image) // 2)
                    file.write(b"\0" * 40)
