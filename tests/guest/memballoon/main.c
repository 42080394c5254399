// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Driver of the virtio memory balloon: devices come and go
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>

#include "memballoon.h"

/* The feature bit of pages of @order pages of the kernel's; bit 1 is 4 KiB. */
#define SIZE_BIT(order)		((order) + PAGE_SHIFT - 12 + 1)
#define MAX_SIZE_BIT		23

static void select_size(struct virtio_device *vdev, unsigned int order)
{
	unsigned int bit;

	for (bit = 1; bit <= MAX_SIZE_BIT; bit++)
		__virtio_clear_bit(vdev, bit);
	__virtio_set_bit(vdev, SIZE_BIT(order));
}

/*
 * The largest order of a size of @features that the kernel keeps memory in one
 * piece for; or -1.
 */
static int largest_order(u64 features)
{
	int order;

	for (order = pageblock_order; order >= 0; order--)
		if (features & BIT_ULL(SIZE_BIT(order)))
			return order;
	return -1;
}

/* Selects one page size, of those that both sides know. */
static int memballoon_validate(struct virtio_device *vdev)
{
	int order = largest_order(vdev->features);

	if (order < 0) {
		dev_err(&vdev->dev, "no page size that suits is offered\n");
		return -EOPNOTSUPP;
	}
	select_size(vdev, order);
	/* Addresses are those of memory, whatever is in front of the rings. */
	__virtio_clear_bit(vdev, VIRTIO_F_ACCESS_PLATFORM);
	return 0;
}

static int start(struct memballoon *mb)
{
	static const char *const names[] = { "fromdevq", "todevq" };
	vq_callback_t *callbacks[] = { memballoon_spoken, memballoon_acked };
	struct virtqueue *vqs[ARRAY_SIZE(names)];
	int err;

	lockdep_assert_held(&mb->lock);
	err = virtio_find_vqs(mb->vdev, ARRAY_SIZE(names), vqs, callbacks,
			      names, NULL);
	if (err)
		return err;
	mb->fromdevq = vqs[0];
	mb->todevq = vqs[1];
	virtio_device_ready(mb->vdev);
	mb->running = true;
	return memballoon_listen(mb);
}

static void stop(struct memballoon *mb)
{
	lockdep_assert_held(&mb->lock);
	mb->running = false;
	virtio_reset_device(mb->vdev);
	mb->vdev->config->del_vqs(mb->vdev);
}

/**
 * memballoon_negotiate - goes on with pages of another size
 * @mb: the balloon
 * @order: order of the size, which is offered
 *
 * The device is reset, upon which every page is the driver's, and gets them all
 * again. No single pages may be in the balloon if a size of more than the
 * kernel's is asked for.
 *
 * Return: 0 or an error, after which the device is not used any more.
 */
int memballoon_negotiate(struct memballoon *mb, unsigned int order)
{
	struct virtio_device *vdev = mb->vdev;
	int err;

	lockdep_assert_held(&mb->lock);
	if (order == mb->unit_order)
		return 0;
	stop(mb);
	virtio_add_status(vdev, VIRTIO_CONFIG_S_ACKNOWLEDGE);
	virtio_add_status(vdev, VIRTIO_CONFIG_S_DRIVER);
	select_size(vdev, order);
	err = vdev->config->finalize_features(vdev);
	if (err)
		goto failed;
	virtio_add_status(vdev, VIRTIO_CONFIG_S_FEATURES_OK);
	err = -ENODEV;
	if (!(vdev->config->get_status(vdev) & VIRTIO_CONFIG_S_FEATURES_OK))
		goto failed;
	mb->unit_order = order;
	mb->counters.negotiations++;
	err = start(mb);
	if (!err)
		err = memballoon_give_again(mb);
	if (!err)
		return 0;
failed:
	mb->running = false;
	virtio_add_status(vdev, VIRTIO_CONFIG_S_FAILED);
	dev_err(&vdev->dev, "the device does not go on: %d\n", err);
	return err;
}

static int memballoon_init(struct memballoon *mb)
{
	struct virtio_device *vdev = mb->vdev;
	u64 offered = vdev->config->get_features(vdev);
	int err;

	mutex_init(&mb->lock);
	init_waitqueue_head(&mb->acked);
	INIT_DELAYED_WORK(&mb->work, memballoon_follow);
	mb->large_order = largest_order(vdev->features);
	mb->wanted_order = mb->large_order;
	mb->unit_order = mb->large_order;
	mb->block_order = mb->large_order ?: pageblock_order;
	mb->small_offered = offered & BIT_ULL(SIZE_BIT(0));
	mb->buffers = kzalloc(sizeof(*mb->buffers), GFP_KERNEL);
	if (!mb->buffers)
		return -ENOMEM;
	err = memballoon_pages_init(mb);
	if (err)
		return err;
	memballoon_pace_init(mb);
	mb->workqueue = alloc_workqueue("memballoon",
					WQ_FREEZABLE | WQ_UNBOUND, 1);
	return mb->workqueue ? 0 : -ENOMEM;
}

static void memballoon_exit(struct memballoon *mb)
{
	if (mb->workqueue)
		destroy_workqueue(mb->workqueue);
	kfree(mb->nodes);
	kfree(mb->buffers);
	kfree(mb);
}

static int memballoon_probe(struct virtio_device *vdev)
{
	struct memballoon *mb = kzalloc(sizeof(*mb), GFP_KERNEL);
	int err;

	if (!mb)
		return -ENOMEM;
	mb->vdev = vdev;
	vdev->priv = mb;
	err = memballoon_init(mb);
	if (err)
		goto out;
	err = memballoon_relief_init(mb);
	if (err)
		goto out;
	mutex_lock(&mb->lock);
	err = start(mb);
	mutex_unlock(&mb->lock);
	if (err)
		goto out_relief;
	dev_info(&vdev->dev, "pages of %lu KiB\n",
		 (PAGE_SIZE << mb->unit_order) / 1024);
	return 0;

out_relief:
	memballoon_relief_exit(mb);
out:
	memballoon_exit(mb);
	return err;
}

/* Every page is the guest's again. */
static void leave(struct memballoon *mb)
{
	cancel_delayed_work_sync(&mb->work);
	mutex_lock(&mb->lock);
	stop(mb);
	mutex_unlock(&mb->lock);
	/* The device might have said something in between. */
	cancel_delayed_work_sync(&mb->work);
	mutex_lock(&mb->lock);
	memballoon_release(mb);
	mutex_unlock(&mb->lock);
}

static void memballoon_remove(struct virtio_device *vdev)
{
	struct memballoon *mb = vdev->priv;

	memballoon_relief_exit(mb);
	leave(mb);
	memballoon_exit(mb);
}

#ifdef CONFIG_PM_SLEEP
static int memballoon_freeze(struct virtio_device *vdev)
{
	leave(vdev->priv);
	return 0;
}

static int memballoon_restore(struct virtio_device *vdev)
{
	struct memballoon *mb = vdev->priv;
	int err;

	mutex_lock(&mb->lock);
	err = start(mb);
	mutex_unlock(&mb->lock);
	return err;
}
#endif

static const struct virtio_device_id memballoon_ids[] = {
	{ VIRTIO_ID_MEMORY_BALLOON, VIRTIO_DEV_ANY_ID },
	{ 0 }
};
MODULE_DEVICE_TABLE(virtio, memballoon_ids);

/* Sizes that no order reaches are refused in memballoon_validate(). */
static const unsigned int memballoon_features[] = {
	1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
	13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
	VIRTIO_MEMBALLOON_F_NODE,
};

static struct virtio_driver memballoon_driver = {
	.driver.name = KBUILD_MODNAME,
	.driver.owner = THIS_MODULE,
	.driver.dev_groups = memballoon_groups,
	.feature_table = memballoon_features,
	.feature_table_size = ARRAY_SIZE(memballoon_features),
	.id_table = memballoon_ids,
	.validate = memballoon_validate,
	.probe = memballoon_probe,
	.remove = memballoon_remove,
#ifdef CONFIG_PM_SLEEP
	.freeze = memballoon_freeze,
	.restore = memballoon_restore,
#endif
};
module_virtio_driver(memballoon_driver);

MODULE_DESCRIPTION("Virtio memory balloon (device ID 13)");
MODULE_LICENSE("GPL");
