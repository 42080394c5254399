// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Driver of the virtio memory balloon: commands and messages
 *
 * There is one buffer for commands, and one command at a time: mb->lock is held
 * from the first address until the answer. Nothing here waits for memory.
 */
#include <acpi/acpi_numa.h>
#include <linux/scatterlist.h>
#include <linux/virtio_config.h>

#include "memballoon.h"

enum { COMMAND_GET, COMMAND_GIVE, COMMAND_EXCHANGE };

/* What the device says: how large the balloon should be at least. */
enum { MESSAGE_MIN_BALLOON = 32768, MESSAGE_MIN_NODES = 32769 };

/**
 * memballoon_append - names pages in the next command
 * @mb: the balloon
 * @n: how many addresses it has; counted up
 * @page: the first page of the negotiated size
 * @units: how many of them follow each other
 */
void memballoon_append(struct memballoon *mb, unsigned int *n,
		       struct page *page, unsigned int units)
{
	u64 address = page_to_phys(page);

	for (; units && *n < MEMBALLOON_ADDRESSES; units--) {
		mb->buffers->addresses[(*n)++] = cpu_to_le64(address);
		address += PAGE_SIZE << mb->unit_order;
	}
}

static bool is_acked(struct virtqueue *vq, unsigned int *len)
{
	return virtqueue_get_buf(vq, len) || virtqueue_is_broken(vq);
}

/*
 * Has the device carry out a command with the first @n addresses. Returns its
 * answer, if it is to give one, or an error if the device is gone: then nobody
 * knows whose the pages are.
 */
static int carry_out(struct memballoon *mb, u64 command, unsigned int n,
		     bool answered)
{
	struct memballoon_buffers *buffers = mb->buffers;
	struct scatterlist out, in, *lists[] = { &out, &in };
	unsigned int len = 0;
	int err;

	lockdep_assert_held(&mb->lock);
	if (!mb->running)
		return -ENODEV;
	buffers->command = cpu_to_le64(command);
	buffers->answer = 0;
	sg_init_one(&out, &buffers->command, (1 + n) * sizeof(__le64));
	sg_init_one(&in, &buffers->answer, sizeof(buffers->answer));
	err = virtqueue_add_sgs(mb->todevq, lists, 1, answered, buffers,
				GFP_NOWAIT | __GFP_NOWARN);
	if (err)
		return err;
	virtqueue_kick(mb->todevq);
	/* A device that is pulled out wakes nobody. */
	while (!wait_event_timeout(mb->acked, is_acked(mb->todevq, &len), HZ))
		;
	if (virtqueue_is_broken(mb->todevq)) {
		mb->running = false;
		return -EIO;
	}
	if (!answered || len < sizeof(buffers->answer))
		return 0;
	return min_t(u64, le64_to_cpu(buffers->answer), n);
}

/**
 * memballoon_give - gives the pages that were named
 * @mb: the balloon
 * @n: how many addresses
 *
 * Return: 0 or an error.
 */
int memballoon_give(struct memballoon *mb, unsigned int n)
{
	return carry_out(mb, COMMAND_GIVE, n, false);
}

/**
 * memballoon_get - wants the pages that were named back
 * @mb: the balloon
 * @n: how many addresses
 *
 * Return: how many of them, from the first on, are the driver's again; or an
 * error.
 */
int memballoon_get(struct memballoon *mb, unsigned int n)
{
	return carry_out(mb, COMMAND_GET, n, true);
}

/**
 * memballoon_exchange - wants the first half of what was named for the other
 * @mb: the balloon
 * @n: how many addresses, both halves
 *
 * Return: 0 or an error, upon which nothing is exchanged.
 */
int memballoon_exchange(struct memballoon *mb, unsigned int n)
{
	int pairs = carry_out(mb, COMMAND_EXCHANGE, n, true);

	if (pairs < 0)
		return pairs;
	return pairs == n / 2 ? 0 : -EAGAIN;
}

/**
 * memballoon_listen - leaves the device a buffer to speak into
 * @mb: the balloon
 *
 * Return: 0 or an error.
 */
int memballoon_listen(struct memballoon *mb)
{
	unsigned int fields = 2;
	struct scatterlist in;
	int err;

	if (virtio_has_feature(mb->vdev, VIRTIO_MEMBALLOON_F_NODE))
		fields += MEMBALLOON_NODES;
	sg_init_one(&in, mb->buffers->message, fields * sizeof(__le64));
	err = virtqueue_add_inbuf(mb->fromdevq, &in, 1, mb->buffers,
				  GFP_NOWAIT | __GFP_NOWARN);
	if (!err)
		virtqueue_kick(mb->fromdevq);
	return err;
}

/* The kernel's number of a node as the platform counts them. */
static int node_of_platform(unsigned int number)
{
#ifdef CONFIG_ACPI_NUMA
	int nid = pxm_to_node(number);
#else
	int nid = number;
#endif
	return nid >= 0 && nid < nr_node_ids ? nid : NUMA_NO_NODE;
}

/* How large the balloon should be on each node. */
static void hear_nodes(struct memballoon *mb, const __le64 *values,
		       unsigned int n)
{
	unsigned int i;
	int nid;

	for (nid = 0; nid < nr_node_ids; nid++)
		mb->nodes[nid].minimum = 0;
	mb->minimum = 0;
	for (i = 0; i < n; i++) {
		nid = node_of_platform(i);
		mb->minimum += le64_to_cpu(values[i]);
		if (nid != NUMA_NO_NODE)
			mb->nodes[nid].minimum = le64_to_cpu(values[i]);
	}
}

/**
 * memballoon_hear - takes notice of what the device said, if it did
 * @mb: the balloon
 *
 * A value that is said again means that the driver is to try again.
 */
void memballoon_hear(struct memballoon *mb)
{
	const __le64 *message = mb->buffers->message;
	unsigned int len;

	lockdep_assert_held(&mb->lock);
	while (mb->running && virtqueue_get_buf(mb->fromdevq, &len)) {
		u64 number = len < 2 * sizeof(__le64) ? 0 :
						le64_to_cpu(message[0]);
		u64 argument = le64_to_cpu(message[1]);

		if (number == MESSAGE_MIN_BALLOON) {
			mb->minimum = (s64)argument;
			mb->by_node = false;
			memballoon_pace_init(mb);
		} else if (number == MESSAGE_MIN_NODES &&
			   argument <= MEMBALLOON_NODES &&
			   len >= (2 + argument) * sizeof(__le64)) {
			hear_nodes(mb, message + 2, argument);
			mb->by_node = true;
			memballoon_pace_init(mb);
		}
		if (memballoon_listen(mb))
			return;
	}
}

/* The device has said something. */
void memballoon_spoken(struct virtqueue *vq)
{
	memballoon_poke(vq->vdev->priv);
}

/* The device has carried out a command. */
void memballoon_acked(struct virtqueue *vq)
{
	struct memballoon *mb = vq->vdev->priv;

	wake_up(&mb->acked);
}
