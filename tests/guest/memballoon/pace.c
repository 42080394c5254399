// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Driver of the virtio memory balloon: how fast the balloon follows the device
 *
 * Memory that is free is given as fast as commands go. Where there is none left,
 * the driver waits for the kernel to write back, drop and compact: slowly, faster
 * as long as that goes well, half as fast when it does not, and after a failure
 * it is some time before it counts on free memory again. So a host may ask for
 * more than a guest has, and that costs the guest next to nothing.
 */
#include <linux/jiffies.h>
#include <linux/mm.h>

#include "memballoon.h"

#define PAGES(mib)		((unsigned long)(mib) << (20 - PAGE_SHIFT))

/* How often memory is waited for, and how much of it in a second. */
#define TICK			(HZ / 10)
#define RATE_MIN		PAGES(64)
#define RATE_STEP		PAGES(64)
#define RATE_MAX		PAGES(1024)
/* How long memory is waited for after none was free. */
#define CALM			(4 * TICK)
/* After so many failures in a row smaller pages are tried. */
#define FAILURES		4
/* Waiting times double with each failure, up to about six seconds. */
#define MAX_DOUBLINGS		6
/* How long a guest that was out of memory is left alone. */
#define YIELD			(10 * HZ)

static void restart(struct memballoon_pace *pace)
{
	pace->rate = RATE_MIN;
	pace->failures = 0;
	pace->calm_at = jiffies;
	pace->next_at = jiffies;
}

/* The device has spoken: whatever went wrong before, it is tried again. */
void memballoon_pace_init(struct memballoon *mb)
{
	int nid;

	for (nid = 0; nid < nr_node_ids; nid++)
		restart(&mb->nodes[nid].pace);
	restart(&mb->pace);
	mb->grow_at = jiffies;
}

/* Pages that make up @bytes, in whole pages of the negotiated size. */
static unsigned long target(const struct memballoon *mb, u64 bytes)
{
	u64 unit = (u64)PAGE_SIZE << mb->unit_order;

	return DIV_ROUND_UP_ULL(bytes, unit) << mb->unit_order;
}

/**
 * memballoon_excess - pages that the host would let the guest have
 * @mb: the balloon
 * @node: of a node, which the device has spoken of; or NULL: of all
 *
 * Return: how many.
 */
unsigned long memballoon_excess(struct memballoon *mb,
				struct memballoon_node *node)
{
	unsigned long pages = node ? memballoon_node_pages(mb, node) :
				     mb->pages;
	unsigned long least = target(mb, node ? node->minimum :
						max(mb->minimum, 0LL));

	return pages > least ? pages - least : 0;
}

/* The guest needs its memory more than the host does. */
void memballoon_yield(struct memballoon *mb)
{
	lockdep_assert_held(&mb->lock);
	mb->grow_at = jiffies + YIELD;
}

void memballoon_poke(struct memballoon *mb)
{
	mod_delayed_work(mb->workqueue, &mb->work, 0);
}

/* Nothing was to be had. */
static void fail(struct memballoon_pace *pace)
{
	pace->failures++;
	pace->next_at = jiffies + (TICK << min_t(unsigned int, pace->failures,
						  MAX_DOUBLINGS));
}

/* Memory there is, but not in large pieces. */
static bool is_fragmented(struct memballoon *mb, struct memballoon_pace *pace)
{
	return mb->unit_order && mb->small_offered &&
	       pace->failures >= FAILURES &&
	       si_mem_available() > 1L << mb->block_order;
}

/* Gives up to @want pages, as far as the pace allows. */
static int grow(struct memballoon *mb, struct memballoon_pace *pace, int nid,
		unsigned long want)
{
	bool sleeping = time_before(jiffies, pace->calm_at);
	struct memballoon_batch batch;
	bool enough;
	long given;

	if (sleeping)
		want = min(want, pace->rate / (HZ / TICK));
	memballoon_batch_init(&batch);
	mutex_unlock(&mb->lock);
	enough = memballoon_allocate(mb, &batch, nid, want, sleeping);
	mutex_lock(&mb->lock);
	given = memballoon_put(mb, &batch);
	if (given < 0)
		return given;
	if (!enough)
		pace->calm_at = jiffies + CALM;
	if (!sleeping)
		return 0;
	if (enough)
		pace->rate = min(pace->rate + RATE_STEP, RATE_MAX);
	else
		pace->rate = max(pace->rate / 2, RATE_MIN);
	if (given) {
		pace->failures = 0;
		pace->next_at = jiffies + TICK;
		return 0;
	}
	fail(pace);
	if (!is_fragmented(mb, pace))
		return 0;
	restart(pace);
	return memballoon_negotiate(mb, 0);
}

/*
 * One step towards the minimum of a node, or of all. Returns when the next one
 * is due, in jiffies; or an error, if there is nothing to do until the device
 * speaks.
 */
static long step(struct memballoon *mb, struct memballoon_node *node)
{
	struct memballoon_pace *pace = node ? &node->pace : &mb->pace;
	unsigned long pages = node ? memballoon_node_pages(mb, node) :
				     mb->pages;
	unsigned long least = target(mb, node ? node->minimum :
						max(mb->minimum, 0LL));
	unsigned long at = pace->next_at;
	long taken;

	if (pages == least || (pages > least && memballoon_lazy))
		return -EALREADY;
	if (pages < least && time_before(at, mb->grow_at))
		at = mb->grow_at;
	if (time_before(jiffies, at))
		return at - jiffies;
	if (pages < least)
		return grow(mb, pace, node ? node - mb->nodes : NUMA_NO_NODE,
			    least - pages);
	taken = memballoon_take(mb, node, pages - least);
	if (!taken)
		fail(pace);
	return min(taken, 0L);
}

/* A step on every node that the device has spoken of. */
static long step_nodes(struct memballoon *mb)
{
	long first = -EALREADY;
	int nid;

	for_each_node_state(nid, N_MEMORY) {
		long wait = step(mb, &mb->nodes[nid]);

		if (wait >= 0 && (first < 0 || wait < first))
			first = wait;
	}
	return first;
}

/* Small pages were but a last resort: large ones do again. */
static int go_back(struct memballoon *mb)
{
	if (!mb->running || mb->unit_order == mb->wanted_order ||
	    memballoon_nr_small(mb))
		return -EALREADY;
	return memballoon_negotiate(mb, mb->wanted_order);
}

void memballoon_follow(struct work_struct *work)
{
	struct memballoon *mb = container_of(to_delayed_work(work),
					     struct memballoon, work);
	long wait;

	do {
		mutex_lock(&mb->lock);
		memballoon_hear(mb);
		if (!mb->running)
			wait = -ENODEV;
		else if (mb->by_node)
			wait = step_nodes(mb);
		else
			wait = step(mb, NULL);
		if (wait < 0)
			wait = go_back(mb);
		mutex_unlock(&mb->lock);
		cond_resched();
	} while (!wait);
	/* Unless there is news already. */
	if (wait > 0)
		queue_delayed_work(mb->workqueue, &mb->work, wait);
}
