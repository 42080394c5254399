/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Driver of the virtio memory balloon with device ID 13
 *
 * The protocol is described in docs/memballoon.md; its terms are used here.
 *
 *   main.c        devices come and go; which page size is negotiated
 *   commands.c    what is said in the two queues
 *   pages.c       the pages in the balloon, by node; giving and taking them
 *   pace.c        how fast the balloon follows what the device says
 *   relief.c      a kernel that is short of memory, or of large pages
 *   attributes.c  what is seen and set under /sys
 */
#ifndef MEMBALLOON_H
#define MEMBALLOON_H

#include <linux/balloon_compaction.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/shrinker.h>
#include <linux/sizes.h>
#include <linux/types.h>
#include <linux/virtio.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

/* The most addresses of a command, the most bytes of more than two, and the most nodes of a message. */
#define MEMBALLOON_ADDRESSES	1024
#define MEMBALLOON_BYTES	SZ_2G
#define MEMBALLOON_NODES	16

/* The device may say how large the balloon should be on each node. */
#define VIRTIO_MEMBALLOON_F_NODE	50

/**
 * struct memballoon_buffers - what the device reads and writes
 * @command: number of the command
 * @addresses: its addresses
 * @answer: how many pages went the driver's way
 * @message: number and argument of what the device says, and what follows them
 */
struct memballoon_buffers {
	__le64 command;
	__le64 addresses[MEMBALLOON_ADDRESSES];
	__le64 answer;
	__le64 message[2 + MEMBALLOON_NODES];
};

/**
 * struct memballoon_pace - how fast the balloon follows a target, see pace.c
 * @rate: pages a second that may be had by waiting for memory
 * @failures: how often in a row nothing was to be had
 * @calm_at: when memory is to be had without waiting again
 * @next_at: when to try again after failures
 */
struct memballoon_pace {
	unsigned long rate;
	unsigned int failures;
	unsigned long calm_at;
	unsigned long next_at;
};

/**
 * struct memballoon_node - what the balloon has of a node's memory
 * @mb: the balloon
 * @blocks: blocks, by the list heads of their first pages
 * @nr_blocks: how many
 * @small: single pages, which the kernel may move
 * @nr_small: how many, those included that are about to be moved
 * @minimum: bytes that it should have at least, if the device says so of nodes
 * @pace: how fast that is followed
 *
 * A block is a page of the largest size that the driver uses; 2 MiB on x86. It
 * is given and taken as one page or, where the negotiated size is less, as
 * several that follow each other. Single pages are a last resort.
 */
struct memballoon_node {
	struct memballoon *mb;
	struct list_head blocks;
	unsigned long nr_blocks;
	struct balloon_dev_info small;
	unsigned long nr_small;
	u64 minimum;
	struct memballoon_pace pace;
};

/**
 * struct memballoon_counters - what happened, in pages of the kernel
 */
struct memballoon_counters {
	u64 given;
	u64 taken;
	u64 refused;
	u64 exchanged;
	u64 oom;
	u64 negotiations;
};

/**
 * struct memballoon - one device
 * @vdev: the device
 * @fromdevq: where it speaks
 * @todevq: where the driver commands
 * @buffers: what it reads and writes
 * @acked: woken when a command was carried out
 * @lock: one command at a time; the pages; everything below. Whoever holds it
 *	does not allocate memory, so those who want memory may wait for it.
 * @running: the queues can be used
 * @large_order: order of the largest page size that is offered and suits
 * @small_offered: the kernel's own page size is offered
 * @wanted_order: order of the size that is negotiated if nothing speaks against it
 * @unit_order: order of the negotiated size
 * @block_order: order of a block
 * @nodes: the pages, by node
 * @pages: all of them
 * @minimum: bytes that the balloon should have at least
 * @by_node: that is the sum of what each node should have at least
 * @pace: how fast that is followed, if not by node
 * @grow_at: when the guest, which was out of memory, can do with less again
 * @counters: what happened
 * @workqueue: for @work alone
 * @work: follows @minimum
 * @shrinker: gives back what the host does not insist on
 * @oom: gives back what it does insist on
 */
struct memballoon {
	struct virtio_device *vdev;
	struct virtqueue *fromdevq;
	struct virtqueue *todevq;
	struct memballoon_buffers *buffers;
	wait_queue_head_t acked;

	struct mutex lock;
	bool running;
	unsigned int large_order;
	bool small_offered;
	unsigned int wanted_order;
	unsigned int unit_order;
	unsigned int block_order;
	struct memballoon_node *nodes;
	unsigned long pages;
	s64 minimum;
	bool by_node;
	struct memballoon_pace pace;
	unsigned long grow_at;
	struct memballoon_counters counters;

	struct workqueue_struct *workqueue;
	struct delayed_work work;
	struct shrinker shrinker;
	struct notifier_block oom;
};

/**
 * struct memballoon_batch - pages that one command is about
 * @blocks: blocks, the first of which come first
 * @small: single pages, which come before them
 * @nr_blocks: how many blocks
 * @nr_small: how many single pages
 */
struct memballoon_batch {
	struct list_head blocks;
	struct list_head small;
	unsigned int nr_blocks;
	unsigned int nr_small;
};

/* Addresses that a block takes in a command. */
static inline unsigned int memballoon_units(const struct memballoon *mb)
{
	return 1U << (mb->block_order - mb->unit_order);
}

/* The most addresses of a command, with pages of the negotiated size. */
static inline unsigned int memballoon_room(const struct memballoon *mb)
{
	u64 fit = MEMBALLOON_BYTES >> (PAGE_SHIFT + mb->unit_order);

	return clamp_t(u64, fit, 2, MEMBALLOON_ADDRESSES);
}

static inline unsigned long
memballoon_node_pages(const struct memballoon *mb,
		      const struct memballoon_node *node)
{
	return (node->nr_blocks << mb->block_order) + node->nr_small;
}

/* commands.c */
void memballoon_append(struct memballoon *mb, unsigned int *n,
		       struct page *page, unsigned int units);
int memballoon_give(struct memballoon *mb, unsigned int n);
int memballoon_get(struct memballoon *mb, unsigned int n);
int memballoon_exchange(struct memballoon *mb, unsigned int n);
int memballoon_listen(struct memballoon *mb);
void memballoon_hear(struct memballoon *mb);
void memballoon_spoken(struct virtqueue *vq);
void memballoon_acked(struct virtqueue *vq);

/* pages.c */
int memballoon_pages_init(struct memballoon *mb);
void memballoon_batch_init(struct memballoon_batch *batch);
struct page *memballoon_alloc(int nid, unsigned int order, bool sleeping);
void memballoon_free(struct page *page, unsigned int order);
bool memballoon_allocate(struct memballoon *mb, struct memballoon_batch *batch,
			 int nid, unsigned long want, bool sleeping);
long memballoon_put(struct memballoon *mb, struct memballoon_batch *batch);
long memballoon_take(struct memballoon *mb, struct memballoon_node *node,
		     unsigned long want);
int memballoon_give_again(struct memballoon *mb);
void memballoon_release(struct memballoon *mb);
unsigned long memballoon_nr_small(struct memballoon *mb);
void memballoon_add_block(struct memballoon *mb, struct page *page);
void memballoon_add_small(struct memballoon *mb, struct page *page);
unsigned int memballoon_remove_small(struct memballoon_node *node,
				     struct list_head *pages, unsigned int n);

/* pace.c */
void memballoon_pace_init(struct memballoon *mb);
unsigned long memballoon_excess(struct memballoon *mb,
				struct memballoon_node *node);
void memballoon_yield(struct memballoon *mb);
void memballoon_poke(struct memballoon *mb);
void memballoon_follow(struct work_struct *work);

/* relief.c */
int memballoon_relief_init(struct memballoon *mb);
void memballoon_relief_exit(struct memballoon *mb);
int memballoon_migrate(struct balloon_dev_info *info, struct page *new,
		       struct page *old, enum migrate_mode mode);
int memballoon_compact(struct memballoon *mb);
extern bool memballoon_lazy;

/* attributes.c */
extern const struct attribute_group *memballoon_groups[];

/* main.c */
int memballoon_negotiate(struct memballoon *mb, unsigned int order);

#endif
