// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Driver of the virtio memory balloon: a kernel that is short of memory, or of
 * memory in one piece
 *
 * What the host does not insist on goes back as soon as memory is reclaimed,
 * and what it does insist on before somebody is killed. Single pages are moved,
 * or exchanged for a block, by EXCHANGE: the balloon keeps its size throughout,
 * so that needs no memory of the host.
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/oom.h>

#include "memballoon.h"

bool memballoon_lazy;
module_param_named(lazy, memballoon_lazy, bool, 0644);
MODULE_PARM_DESC(lazy,
		 "leave memory with the host until it is needed here (off)");

static unsigned int oom_mib = 16;
module_param(oom_mib, uint, 0644);
MODULE_PARM_DESC(oom_mib,
		 "taken back when memory has run out, in MiB; 0: nothing (16)");

static unsigned long count_excess(struct shrinker *shrinker,
				  struct shrink_control *control)
{
	struct memballoon *mb = container_of(shrinker, struct memballoon,
					     shrinker);
	unsigned long excess;

	/* Whoever has it may be waiting for the device: look elsewhere. */
	if (!mutex_trylock(&mb->lock))
		return 0;
	excess = memballoon_excess(mb, NULL);
	mutex_unlock(&mb->lock);
	return excess ?: SHRINK_EMPTY;
}

static unsigned long take_excess(struct shrinker *shrinker,
				 struct shrink_control *control)
{
	struct memballoon *mb = container_of(shrinker, struct memballoon,
					     shrinker);
	struct memballoon_node *node = NULL;
	unsigned long excess;
	long taken = 0;
	int nid;

	if (!mutex_trylock(&mb->lock))
		return SHRINK_STOP;
	excess = memballoon_excess(mb, NULL);
	for (nid = 0; mb->by_node && excess && nid < nr_node_ids; nid++) {
		node = &mb->nodes[nid];
		excess = memballoon_excess(mb, node);
		if (excess)
			break;
	}
	if (excess)
		taken = memballoon_take(mb, node,
					min(control->nr_to_scan, excess));
	mutex_unlock(&mb->lock);
	return taken > 0 ? taken : SHRINK_STOP;
}

static int on_oom(struct notifier_block *block, unsigned long unused,
		  void *freed)
{
	struct memballoon *mb = container_of(block, struct memballoon, oom);
	unsigned long want = (unsigned long)oom_mib << (20 - PAGE_SHIFT);
	long taken;

	mutex_lock(&mb->lock);
	taken = memballoon_take(mb, NULL, want);
	if (taken > 0) {
		mb->counters.oom += taken;
		*(unsigned long *)freed += taken;
		memballoon_yield(mb);
	}
	mutex_unlock(&mb->lock);
	return NOTIFY_OK;
}

int memballoon_relief_init(struct memballoon *mb)
{
	int err;

	mb->shrinker.count_objects = count_excess;
	mb->shrinker.scan_objects = take_excess;
	mb->shrinker.seeks = DEFAULT_SEEKS;
	err = register_shrinker(&mb->shrinker, "virtio-memballoon");
	if (err)
		return err;
	mb->oom.notifier_call = on_oom;
	err = register_oom_notifier(&mb->oom);
	if (err)
		unregister_shrinker(&mb->shrinker);
	return err;
}

void memballoon_relief_exit(struct memballoon *mb)
{
	unregister_oom_notifier(&mb->oom);
	unregister_shrinker(&mb->shrinker);
}

#ifdef CONFIG_BALLOON_COMPACTION
/**
 * memballoon_migrate - the kernel wants a single page to be elsewhere
 * @info: the list that @old was isolated from
 * @new: another page, which the kernel owns
 * @old: the page, which is in the balloon
 * @mode: how hard to try
 *
 * Return: MIGRATEPAGE_SUCCESS, if @old is the kernel's and @new in the balloon;
 * or an error, if all is as it was.
 */
int memballoon_migrate(struct balloon_dev_info *info, struct page *new,
		       struct page *old, enum migrate_mode mode)
{
	struct memballoon_node *from = container_of(info,
						    struct memballoon_node,
						    small);
	struct memballoon *mb = from->mb;
	struct memballoon_node *to = &mb->nodes[page_to_nid(new)];
	unsigned long flags;
	unsigned int n = 0;

	/* The lock may be held by one who waits for this. */
	if (!mutex_trylock(&mb->lock))
		return -EAGAIN;
	memballoon_append(mb, &n, old, 1);
	memballoon_append(mb, &n, new, 1);
	if (mb->unit_order || memballoon_exchange(mb, n)) {
		mutex_unlock(&mb->lock);
		return -EAGAIN;
	}
	mb->counters.exchanged++;
	get_page(new);	/* The balloon's. */
	spin_lock_irqsave(&to->small.pages_lock, flags);
	balloon_page_insert(&to->small, new);
	__count_vm_event(BALLOON_MIGRATE);
	spin_unlock_irqrestore(&to->small.pages_lock, flags);
	adjust_managed_page_count(new, -1);
	to->nr_small++;

	spin_lock_irqsave(&from->small.pages_lock, flags);
	from->small.isolated_pages--;
	balloon_page_finalize(old);
	spin_unlock_irqrestore(&from->small.pages_lock, flags);
	adjust_managed_page_count(old, 1);
	from->nr_small--;
	mutex_unlock(&mb->lock);
	put_page(old);	/* No longer the balloon's. */
	return MIGRATEPAGE_SUCCESS;
}
#endif

/* Exchanges as many single pages of a node as make a block for one. */
static int consolidate(struct memballoon *mb, struct memballoon_node *node,
		       struct page *block)
{
	unsigned int units = memballoon_units(mb);
	struct page *page, *next;
	unsigned int n = 0;
	LIST_HEAD(pages);
	int err = -EAGAIN;

	lockdep_assert_held(&mb->lock);
	if (memballoon_remove_small(node, &pages, units) == units) {
		list_for_each_entry(page, &pages, lru)
			memballoon_append(mb, &n, page, 1);
		memballoon_append(mb, &n, block, units);
		err = memballoon_exchange(mb, n);
	}
	list_for_each_entry_safe(page, next, &pages, lru) {
		list_del(&page->lru);
		if (err)
			memballoon_add_small(mb, page);
		else
			memballoon_free(page, 0);
	}
	if (err)
		return err;
	mb->counters.exchanged += units;
	memballoon_add_block(mb, block);
	return 0;
}

/**
 * memballoon_compact - makes blocks of the single pages that are in the balloon
 * @mb: the balloon
 *
 * The host gets large pages for small ones, which the guest has room for where
 * larger ones have not.
 *
 * Return: how many blocks were made, or an error.
 */
int memballoon_compact(struct memballoon *mb)
{
	struct page *block;
	int nid, made = 0, err = 0;

	for (nid = 0; nid < nr_node_ids && !err; nid++) {
		struct memballoon_node *node = &mb->nodes[nid];

		while (READ_ONCE(node->nr_small) >> mb->block_order) {
			block = memballoon_alloc(nid, mb->block_order, true);
			if (!block)
				return made ?: -ENOMEM;
			mutex_lock(&mb->lock);
			err = mb->unit_order ? -EAGAIN :
					       consolidate(mb, node, block);
			mutex_unlock(&mb->lock);
			if (err) {
				memballoon_free(block, mb->block_order);
				break;
			}
			made++;
			cond_resched();
		}
	}
	return made ?: err;
}
