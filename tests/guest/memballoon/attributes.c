// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Driver of the virtio memory balloon: attributes of the device under /sys
 *
 * Each is one value. Names say units; sizes are in bytes, and are those of the
 * balloon, never of what is left.
 */
#include <linux/device.h>
#include <linux/mm.h>
#include <linux/sysfs.h>

#include "memballoon.h"

#define to_memballoon(dev)	((struct memballoon *)dev_to_virtio(dev)->priv)

#define MEMBALLOON_ATTR_RO(name, format, value)				\
static ssize_t name##_show(struct device *dev,				\
			   struct device_attribute *attr, char *buf)	\
{									\
	struct memballoon *mb = to_memballoon(dev);			\
	ssize_t len;							\
									\
	mutex_lock(&mb->lock);						\
	len = sysfs_emit(buf, format "\n", value);			\
	mutex_unlock(&mb->lock);					\
	return len;							\
}									\
static DEVICE_ATTR_RO(name)

#define BYTES(pages)		((u64)(pages) << PAGE_SHIFT)

MEMBALLOON_ATTR_RO(size_bytes, "%llu", BYTES(mb->pages));
MEMBALLOON_ATTR_RO(minimum_bytes, "%lld", mb->minimum);
MEMBALLOON_ATTR_RO(small_bytes, "%llu", BYTES(memballoon_nr_small(mb)));
MEMBALLOON_ATTR_RO(rate_bytes, "%llu", BYTES(mb->pace.rate));
MEMBALLOON_ATTR_RO(given_bytes, "%llu", BYTES(mb->counters.given));
MEMBALLOON_ATTR_RO(taken_bytes, "%llu", BYTES(mb->counters.taken));
MEMBALLOON_ATTR_RO(refused_bytes, "%llu", BYTES(mb->counters.refused));
MEMBALLOON_ATTR_RO(exchanged_bytes, "%llu", BYTES(mb->counters.exchanged));
MEMBALLOON_ATTR_RO(oom_bytes, "%llu", BYTES(mb->counters.oom));
MEMBALLOON_ATTR_RO(negotiations, "%llu", mb->counters.negotiations);

/* Of each node of the guest. */
static ssize_t node_bytes_show(struct device *dev,
			       struct device_attribute *attr, char *buf)
{
	struct memballoon *mb = to_memballoon(dev);
	ssize_t len = 0;
	int nid;

	mutex_lock(&mb->lock);
	for_each_node_state(nid, N_MEMORY) {
		struct memballoon_node *node = &mb->nodes[nid];

		len += sysfs_emit_at(buf, len, "%s%llu", len ? " " : "",
				     BYTES(memballoon_node_pages(mb, node)));
	}
	mutex_unlock(&mb->lock);
	return len + sysfs_emit_at(buf, len, "\n");
}
static DEVICE_ATTR_RO(node_bytes);

static ssize_t page_bytes_show(struct device *dev,
			       struct device_attribute *attr, char *buf)
{
	struct memballoon *mb = to_memballoon(dev);

	return sysfs_emit(buf, "%lu\n", PAGE_SIZE << READ_ONCE(mb->unit_order));
}

/* Another page size, of those that are offered. */
static ssize_t page_bytes_store(struct device *dev,
				struct device_attribute *attr,
				const char *buf, size_t count)
{
	struct memballoon *mb = to_memballoon(dev);
	unsigned long bytes;
	unsigned int order;
	int err;

	err = kstrtoul(buf, 0, &bytes);
	if (err)
		return err;
	if (bytes == PAGE_SIZE << mb->large_order)
		order = mb->large_order;
	else if (bytes == PAGE_SIZE && mb->small_offered)
		order = 0;
	else
		return -EINVAL;
	mutex_lock(&mb->lock);
	if (!mb->running)
		err = -ENODEV;
	else if (order && memballoon_nr_small(mb))
		err = -EBUSY;
	else
		err = memballoon_negotiate(mb, order);
	if (!err)
		mb->wanted_order = order;
	mutex_unlock(&mb->lock);
	return err ?: count;
}
static DEVICE_ATTR_RW(page_bytes);

/* Whatever is written. */
static ssize_t compact_store(struct device *dev, struct device_attribute *attr,
			     const char *buf, size_t count)
{
	struct memballoon *mb = to_memballoon(dev);
	int made = memballoon_compact(mb);

	memballoon_poke(mb);
	return made < 0 ? made : count;
}
static DEVICE_ATTR_WO(compact);

static struct attribute *memballoon_attrs[] = {
	&dev_attr_size_bytes.attr,
	&dev_attr_minimum_bytes.attr,
	&dev_attr_node_bytes.attr,
	&dev_attr_small_bytes.attr,
	&dev_attr_page_bytes.attr,
	&dev_attr_rate_bytes.attr,
	&dev_attr_given_bytes.attr,
	&dev_attr_taken_bytes.attr,
	&dev_attr_refused_bytes.attr,
	&dev_attr_exchanged_bytes.attr,
	&dev_attr_oom_bytes.attr,
	&dev_attr_negotiations.attr,
	&dev_attr_compact.attr,
	NULL
};
static const struct attribute_group memballoon_group = {
	.name = "memballoon",
	.attrs = memballoon_attrs,
};
const struct attribute_group *memballoon_groups[] = {
	&memballoon_group,
	NULL
};
